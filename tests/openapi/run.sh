#!/usr/bin/env bash
# schemathesis over /openapi.json of a real kiln process (KILN_BIN, default target/release/kiln): requests made from the
# document, valid and not, must get no server error, no status, type or body that the document doesn't name.
# Installs into target/openapi. One worker: with two, CPython 3.11's parser fails now and then inside the tool.
#   run.sh [schemathesis options]     such as --include-path /queue
set -euo pipefail
cd "$(dirname "$0")"
here="$PWD"
work="$here/../../target/openapi"
mkdir -p "$work"
work="$(cd "$work" && pwd)"
if ! cmp -s requirements.txt "$work/requirements.txt"; then
    rm -rf "$work/venv"
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt "$work/"
fi

source "$here/../serve.sh"

cd "$work"
"$work/venv/bin/schemathesis" run "$url/openapi.json" \
    --checks not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance \
    --phases examples,coverage,fuzzing --max-examples "${EXAMPLES:-10}" --seed 1 --workers 1 --warnings off \
    --exclude-path /ws "$@"
