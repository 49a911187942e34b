#!/usr/bin/env bash
# Published clients of ComfyUI against a real kiln process (KILN_BIN, default target/release/kiln): four from PyPI, two
# from npm, one from crates.io; and the documents' own curl and JavaScript. Each program of this folder runs a workflow
# through one client and writes the pictures it got; check.py looks at them. Installs into target/clients. One line a
# client; fails if one fails.
#   run.sh [name part]     only the clients whose name holds the text
set -euo pipefail
cd "$(dirname "$0")"
here="$PWD"
work="$here/../../target/clients"
mkdir -p "$work"
work="$(cd "$work" && pwd)"

if ! command -v node >/dev/null || ! command -v npm >/dev/null; then
    apt-get update -qq && apt-get install -y -qq --no-install-recommends nodejs npm >/dev/null
fi
if ! cmp -s python/requirements.txt "$work/requirements.txt"; then
    rm -rf "$work/venv"
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install --quiet --disable-pip-version-check -r python/requirements.txt
    cp python/requirements.txt "$work/"
fi
if ! cmp -s js/package.json "$work/package.json"; then
    cp js/package.json "$work/"
    npm install --prefix "$work" --no-package-lock --no-audit --no-fund --silent
fi
cp js/*.mjs "$work/" # node looks for packages beside the program

(
    # as built for every machine: not with kiln's own settings
    unset KILN_NVCC CARGO_INCREMENTAL
    cargo build --quiet --release --manifest-path rust/Cargo.toml --target-dir "$work/rust"
)

source "$here/../serve.sh"

passed=0 failed=0
try() { # name, command
    local name=$1 out
    [[ "$name" == *"${only}"* ]] || return 0
    shift
    out="$(mktemp -d "$base/out.XXXX")"
    local status=0
    timeout 120 "$@" "$url" "$here/workflow.json" "$out" >"$base/client.log" 2>&1 || status=$?
    if [ $status = 0 ] && found="$("$work/venv/bin/python" "$here/check.py" "$out" "${size:-128x64}" 2>&1)"; then
        echo "ok   $name: $found"
        passed=$((passed + 1))
    else
        echo "FAIL $name: exit code $status; $(tail -n 3 "$base/client.log") ${found:-}"
        failed=$((failed + 1))
    fi
}
only="${1:-}"
for program in "$here"/python/*_.py; do
    name="$(basename "$program" _.py)"
    try "PyPI ${name//_/-}" "$work/venv/bin/python" "$program"
done
try "npm comfy-ui-client" node "$work/comfy-ui-client.mjs"
try "npm @stable-canvas/comfyui-client" node "$work/stable-canvas.mjs"
size=512x512 try "README.md curl" "$here/document.sh"
KILN_DOCUMENT="$here/../../docs/api.md" try "docs/api.md JavaScript" node "$work/document.mjs"
try "crates.io comfyui-client" "$work/rust/release/client-test"
echo "$passed clients passed, $failed failed"
[ $failed = 0 ] && [ $passed -gt 0 ]
