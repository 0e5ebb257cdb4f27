#!/usr/bin/env bash
# Builds llama.cpp's programs for one model file, from the source in the package llama-cpp-python, into DIR: needs cmake
# and a C++ compiler, and takes a quarter of an hour on two cores.
set -euo pipefail
version=0.3.36
directory=${1:?usage: build_llama_cpp.sh DIR}
source=$directory/llama_cpp_python-$version/vendor/llama.cpp
mkdir -p "$directory"
if [ ! -d "$source" ]; then
    "${PYTHON:-python3}" -m pip download -q "llama-cpp-python==$version" --no-deps --no-binary :all: -d "$directory"
    tar -xzf "$directory/llama_cpp_python-$version.tar.gz" -C "$directory"
fi
cmake -S "$source" -B "$directory/build" -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=OFF \
    -DGGML_NATIVE=OFF  # a virtual machine may report instructions (AMX) that it does not run
cmake --build "$directory/build" --target llama-diffusion-cli llama-completion -j "$(nproc)"
