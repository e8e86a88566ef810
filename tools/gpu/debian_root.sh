#!/usr/bin/env bash
# Programs of another Debian suite, without installing anything.
#
#     debian_root.sh SUITE FOLDER PROGRAMS PACKAGE…
#
# Downloads the packages with all that they depend on, checked against Debian's keys, unpacks them under FOLDER/root, and writes
# FOLDER/bin/PROGRAM for each of the (space-separated) PROGRAMS, which starts it by the unpacked suite's own loader and libraries.
# A folder that is complete is left as it is. Needs apt with a Debian mirror among its sources; changes nothing outside FOLDER.
set -euo pipefail

suite=$1 folder=$(realpath --canonicalize-missing "$2") programs=$3
shift 3
[ ! -e "$folder/complete" ] || exit 0
command -v apt-get dpkg-deb > /dev/null || { echo "debian_root: needs apt and dpkg" >&2; exit 1; }
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Label: Debian' | sort --unique | head -1)
[ -n "$mirror" ] || { echo "debian_root: apt has no Debian mirror among its sources" >&2; exit 1; }

rm -rf "$folder"
mkdir -p "$folder"/apt/{lists/partial,cache/archives/partial,parts} "$folder"/{bin,packages} "$folder"/root/usr/{bin,lib,lib64}
ln -s usr/bin usr/lib usr/lib64 "$folder/root/"  # as an installed system has them
touch "$folder/apt/status"
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" > "$folder/apt/sources.list"
other_apt() {
    "$1" -oDir::State::Lists="$folder/apt/lists" -oDir::Cache="$folder/apt/cache" -oDir::State::status="$folder/apt/status" \
        -oDir::Etc::sourcelist="$folder/apt/sources.list" -oDir::Etc::sourceparts="$folder/apt/parts" \
        -oDir::Etc::preferencesparts="$folder/apt/parts" -oAPT::Architecture=amd64 -oAPT::Sandbox::User=root \
        -oDebug::NoLocking=1 "${@:2}"
}
other_apt apt-get -qq update
names=$(other_apt apt-get --simulate --no-install-recommends install "$@" | awk '$1 == "Inst" {print $2}')
(cd "$folder/packages" && other_apt apt-get -qq download $names)
for package in "$folder"/packages/*.deb; do
    dpkg-deb --fsys-tarfile "$package" | tar --extract --directory "$folder/root" --keep-directory-symlink
done
rm -rf "$folder/packages" "$folder/apt"

shopt -s nullglob
libraries=$folder/root/usr/lib/x86_64-linux-gnu
for program in $programs; do
    # the newest, where a name has a version behind it
    paths=()
    for path in "$folder"/root/usr/bin/"$program"{,-[0-9]*} "$folder"/root/usr/lib/llvm-*/bin/"$program"; do
        [ ! -e "$path" ] || paths+=("$path")
    done
    path=$(printf "%s\n" "${paths[@]}" | sort --version-sort | tail -1)
    [ -n "$path" ] || { echo "debian_root: no $program in $*" >&2; exit 1; }
    cat > "$folder/bin/$program" << END
#!/bin/sh
exec "$folder/root/usr/lib64/ld-linux-x86-64.so.2" --library-path "$libraries:$libraries/intel-opencl" "$path" "\$@"
END
    chmod +x "$folder/bin/$program"
done
touch "$folder/complete"
