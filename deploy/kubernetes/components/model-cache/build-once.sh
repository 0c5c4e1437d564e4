#!/bin/sh
# Build MODEL into BUNDLE unless a whole one is there. Pods that start together build once: the
# others wait for the lock and find it. A damaged bundle is built again.
set -eu
mkdir -p "$(dirname "$BUNDLE")"
exec 9> "$BUNDLE.init-lock"
flock 9
if fourstep inspect "$BUNDLE"; then exit 0; fi
# shellcheck disable=SC2086  # several options
exec fourstep build "$MODEL" --out "$BUNDLE" $BUILD_OPTIONS
