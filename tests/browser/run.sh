#!/usr/bin/env bash
# Browser tests: kiln's own page, and ComfyUI's official pages, in headless Chromium against a real kiln process
# (KILN_BIN, default target/release/kiln). Installs what is missing; screenshots end up in target/browser.
#   run.sh [page|frontend]     only one of the two
set -euo pipefail
cd "$(dirname "$0")/../.."
here=tests/browser
work="$PWD/target/browser"
mkdir -p "$work"

install() { # command, packages
    if ! command -v "$1" >/dev/null; then
        shift
        apt-get update -qq && apt-get install -y -qq --no-install-recommends "$@" >/dev/null
    fi
}
install node nodejs npm
install npm npm
install chromium chromium fonts-dejavu-core
if ! cmp -s "$here/package-lock.json" "$work/package-lock.json" || ! [ -d "$work/node_modules" ]; then
    cp "$here/package.json" "$here/package-lock.json" "$work/"
    npm ci --prefix "$work" --no-audit --no-fund --silent
fi

# The version that ComfyUI 0.3.64 pins, and the newest that was seen to work.
frontends=""
if [ "${1:-}" != page ]; then
    for version in 1.27.10 1.58.1; do
        if ! [ -f "$work/frontend/$version/comfyui_frontend_package/static/index.html" ]; then
            rm -rf "$work/frontend/$version"
            python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$work/frontend" \
                "comfyui-frontend-package==$version"
            python3 -m zipfile -e "$work"/frontend/comfyui_frontend_package-"$version"-*.whl "$work/frontend/$version"
        fi
        frontends="$frontends:$work/frontend/$version/comfyui_frontend_package/static"
    done
fi

export KILN_BIN="${KILN_BIN:-$PWD/target/release/kiln}" KILN_SHOTS="$work/screenshots" KILN_NODE_MODULES="$work"
export KILN_FRONTENDS="$frontends" CHROMIUM="${CHROMIUM:-$(command -v chromium)}"
for part in page frontend; do
    if [ -z "${1:-}" ] || [ "$1" = "$part" ]; then
        node --test --test-reporter=spec "$here/$part.test.mjs"
    fi
done
