#!/usr/bin/env bash
# The SDK's checks: types, tests against a real kiln process (KILN_BIN, default target/release/kiln), and the wheel.
# Installs what it needs into target/sdk.
set -euo pipefail
cd "$(dirname "$0")"
environment=../target/sdk
if ! [ -f "$environment/ready" ]; then
    rm -rf "$environment"
    python3 -m venv "$environment"
    "$environment/bin/pip" install --quiet --disable-pip-version-check mypy pytest build 'Pillow>=9'
    touch "$environment/ready"
fi
PATH="$PWD/$environment/bin:$PATH"
export PYTHONDONTWRITEBYTECODE=1

mypy --cache-dir ../target/sdk/mypy
PYTHONPATH=src python -m pytest -q -p no:cacheprovider tests
# what is installed must be what was tested
python -m build --outdir ../target/sdk/dist . >/dev/null
pip install --quiet --disable-pip-version-check --force-reinstall --no-deps ../target/sdk/dist/*.whl
(cd / && python -c "import comfyui_client as c; print(f'wheel: comfyui_client {c.__version__} from {c.__file__}')")
