#!/usr/bin/env bash
# The curl command of README.md, as printed but for the address; then the picture that it asked for.
#   document.sh URL WORKFLOW OUT     (the workflow is the README's own)
set -euo pipefail
url=$1 out=$3
readme="$(dirname "$0")/../../README.md"
awk '/^```/ { inside = /^```sh$/; block = ""; next } inside { block = block $0 "\n" } /[}][}][}][}].$/ && block ~ /^curl -X POST/ { printf "%s", block; exit }' \
    "$readme" | sed "s|http://127.0.0.1:8188|$url|" >"$out/command"
grep -q '^curl -X POST' "$out/command"
id="$(bash "$out/command" | python3 -c 'import json, sys; print(json.load(sys.stdin)["prompt_id"])')"
for _ in $(seq 600); do
    curl -sS --fail "$url/history/$id" -o "$out/history"
    name="$(python3 -c '
import json, sys
entry = json.load(open(sys.argv[1])).get(sys.argv[2])
print(entry["outputs"]["9"]["images"][0]["filename"] if entry else "")' "$out/history" "$id")"
    [ -n "$name" ] && break
    sleep 0.2
done
rm "$out/command" "$out/history"
curl -sS --fail "$url/view?filename=$name&type=output" -o "$out/picture.png"
