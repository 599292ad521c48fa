#!/usr/bin/env bash
# Installs the wheel as a user would, with the newest of everything that pip resolves, and runs the ordinary tests on it.
#   run.sh PYTHON TORCH [arguments of pytest]      TORCH: what pip is asked for, such as torch or torch==2.13.0
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$1 torch=$2
shift 2
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
here=$PWD/build/newest-$version
rm -rf "$here"
mkdir -p "$here/tests"
# A copy, so that the wheel is made of nothing stale; later the tests run in it, where src/ is on no path.
tar --exclude=./.git --exclude='./.venv*' --exclude='./.*_cache' --exclude=./build --exclude=./dist --exclude=./runs \
    --exclude='*.egg-info' --exclude=__pycache__ -cf - . | tar -xf - -C "$here/tests"
"$python" -m venv "$here/venv"
bin=$here/venv/bin
"$bin/python" -m pip wheel -q ${PIPFLAGS:-} --no-deps -w "$here" "$here/tests"
rm -rf "$here/tests/build" "$here/tests"/*.egg-info
"$bin/python" -m pip install -q ${PIPFLAGS:-} "$torch" "elbowroom[dev] @ file://$(echo "$here"/*.whl)"
echo "Python $("$python" -c 'import platform; print(platform.python_version())'), and what pip resolved:"
"$bin/python" -m pip list --format=freeze | tee "$here/resolved.txt"
cd "$here/tests"
"$bin/python" -c 'import elbowroom, sys; assert elbowroom.__file__.startswith(sys.prefix), elbowroom.__file__'
"$bin/python" -m pytest -n 2 --dist loadfile -q "$@"
