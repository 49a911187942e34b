# Sourced by the scripts of this folder: a kiln process (KILN_BIN, default target/release/kiln) on a free port over an empty
# folder, which ends with the script. Sets `base`, the folder, and `url`.
base="$(mktemp -d)"
"${KILN_BIN:-$(dirname "${BASH_SOURCE[0]}")/../target/release/kiln}" serve --cpu --port 0 --threads 2 \
    --base-directory "$base" 2>"$base/log" &
server=$!
trap 'kill $server 2>/dev/null; wait $server 2>/dev/null; rm -rf "$base"' EXIT
url=""
for _ in $(seq 300); do
    url="$(grep -o 'http://127.0.0.1:[0-9]*' "$base/log" | head -n 1 || true)"
    [ -n "$url" ] && break
    sleep 0.1
done
[ -n "$url" ] || { cat "$base/log"; exit 1; }
