#!/bin/sh
# Builds and runs the native tests plain, under ASan with UBSan, and under TSan. Non-zero if one fails.
# STRESS=10 makes the racing tests ten times as long.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
build=${1:-$here/../../build/native}
for sanitize in none address thread; do
    echo "== $sanitize"
    cmake -S "$here" -B "$build/$sanitize" -DSANITIZE="$sanitize" >/dev/null
    cmake --build "$build/$sanitize"
    (cd "$build/$sanitize" && ctest --output-on-failure)
done
