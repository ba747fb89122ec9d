#!/usr/bin/env bash
# The gate as a CI step: BUILD builds ARTIFACT; fails with what `compare` says of BASE. Used by action.yml and GitLab.
set -euo pipefail
: "${BUILD:?}" "${ARTIFACT:?}" "${BASE:?}"
out="${OUT:-convnext-export-report}"
rm -rf "$out" && mkdir -p "$out"
if [[ "$BASE" =~ ^0+$ ]]; then BASE=HEAD; fi # a new branch has no commit before its push: take the default branch
depth=()
if [ "$(git rev-parse --is-shallow-repository)" = true ]; then depth=(--depth=1); fi
git fetch --quiet --no-tags ${depth[@]+"${depth[@]}"} origin "$BASE"

words=(--base-rev FETCH_HEAD --build "$BUILD" --batch "${BATCH:-1}" --duration "${DURATION:-6}" -o "$out/compare.json")
while read -r limit; do
  if [ -n "$limit" ]; then words+=(--fail-on "$limit"); fi
done <<< "${FAIL_ON:-p50_ms:5%}"
if [ -n "${DATA:-}" ]; then words+=(--data "$DATA"); fi

code=0
convnext-export compare "${words[@]}" "$ARTIFACT" || code=$?
if [ -f "$out/compare.json" ]; then
  convnext-export report "$out/compare.json" --format html -o "$out/report.html"
  convnext-export report "$out/compare.json" --format junit -o "$out/junit.xml"
  if [ -n "${GITHUB_STEP_SUMMARY:-}" ]; then
    convnext-export report "$out/compare.json" --format github
    convnext-export report "$out/compare.json" --format markdown >> "$GITHUB_STEP_SUMMARY"
    echo "report=$out" >> "$GITHUB_OUTPUT"
  fi
fi
exit "$code"
