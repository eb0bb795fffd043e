#!/usr/bin/env bash
# Fill a folder with the wheels that a machine with torch 2.11 + CUDA and Python 3.12, but no package index, lacks.
#
#   bash tests/gpu/wheels.sh [FOLDER]       FOLDER is .wheels by default
#   MORE="peft==0.21.2" bash tests/gpu/wheels.sh      takes further ones along
set -euo pipefail
out=${1:-.wheels}
python=${PYTHON:-python3}
mkdir -p "$out"

fetch() {
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d "$out" "$@"
}

# These two come as source alone. Without compiled operators DeepSpeed's wheel is pure Python; operators are compiled at
# their first use. An isolated build would fetch torch, so what the build needs goes into a folder of its own.
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
"$python" -m pip install --quiet --target "$tools" 'setuptools>=77' wheel packaging py-cpuinfo ninja psutil
DS_BUILD_OPS=0 DS_ACCELERATOR=cpu PYTHONPATH=$tools \
    "$python" -m pip wheel --quiet --no-deps --no-build-isolation -w "$out" deepspeed==0.19.8 hjson==3.1.0

fetch pydantic==2.14.4 pydantic-core==2.50.5 annotated-types typing-inspection typing-extensions==4.16.0
fetch datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19
fetch jsonargparse==4.53.0 docstring-parser typeshed-client==2.15.0
fetch transformers==5.23.0
# shellcheck disable=SC2086  # a list
[ -z "${MORE:-}" ] || fetch ${MORE}
du -ch "$out"/*.whl | tail -1
