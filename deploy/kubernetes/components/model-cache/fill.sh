#!/bin/sh
# Puts a model on the cache volume: MODEL as the bundle BUNDLE, or, where BUNDLE is empty, the
# checkpoint itself, for torch. A whole bundle is left as it is, a damaged one is built again.
set -eu
if [ -z "$BUNDLE" ]; then
  exec python -c 'import sys; from engines.build.source import find_model; find_model(sys.argv[1])' "$MODEL"
fi
if fourstep inspect "$BUNDLE"; then exit 0; fi
# Only to build is the lock taken: of two Jobs that start together one builds, the other finds it.
mkdir -p "$(dirname "$BUNDLE")"
exec 9> "$BUNDLE.fill-lock"
flock 9
if fourstep inspect "$BUNDLE"; then exit 0; fi
# shellcheck disable=SC2086  # several options
exec fourstep build "$MODEL" --out "$BUNDLE" $BUILD_OPTIONS \
  ${COMPUTE_CAPABILITY:+--compute-capability "$COMPUTE_CAPABILITY"}
