#!/usr/bin/env bash
# The virtual environments of the Makefile: finds a Python, makes an environment with it, installs into that.
#
#     tools/environment.sh find [PYTHON]                # prints the path of a Python that can make one
#     tools/environment.sh make FOLDER [PYTHON]         # makes FOLDER, unless it is there and whole
#     tools/environment.sh install FOLDER ARGUMENT ...  # pip install ARGUMENT ..., with a line for what takes long
#
# PYTHON is a name or a path. Without one, an environment that is there keeps its Python, and a new one takes the newest
# of those below.
set -euo pipefail

NEWEST_FIRST=(python3.13 python3.12 python3.11 python3) # the last one may be newer than what was tested
OLDEST=3.11

say_error() {
    printf 'error: %s\n' "$@" >&2
    exit 1
}

is_too_old() {
    [ "$(printf '%s\n' "$OLDEST" "$1" | sort --version-sort | head -n 1)" != "$OLDEST" ]
}

version_of() {
    "$1" -c 'import platform; print(platform.python_version())' 2>/dev/null
}

# The file behind a name, a shim or an environment that may be about to be removed.
base_of() {
    realpath "$("$1" -c 'import sys; print(sys._base_executable)')"
}

# The newest release of python3.N that pyenv has. Its shim on the path ends with an error where another one is chosen.
of_pyenv() {
    local root release
    [[ $1 =~ ^python3\.[0-9]+$ ]] && root=$(pyenv root 2>/dev/null) || return 0
    release=$(ls "$root/versions" 2>/dev/null | grep -E "^${1#python}\.[0-9]+$" | sort --version-sort | tail -n 1) || return 0
    echo "$root/versions/$release/bin/python"
}

# Why this Python makes no environment; nothing where it does.
fault_of() {
    local version
    if ! version=$(version_of "$1"); then
        echo "does not run"
    elif is_too_old "$version"; then
        echo "is $version; $OLDEST or newer is needed"
    elif ! "$1" -c 'import ensurepip, venv' 2>/dev/null; then
        echo "is $version without the modules venv and ensurepip"
    fi
}

find_python() {
    local name python fault faults=
    for name in "${@:-${NEWEST_FIRST[@]}}"; do
        [ -n "$(type -P "$name")" ] || faults+="    $name: not there"$'\n'
        for python in "$(type -P "$name")" "$(of_pyenv "$name")"; do
            [ -n "$python" ] || continue
            fault=$(fault_of "$python")
            if [ -z "$fault" ]; then
                base_of "$python"
                return
            fi
            faults+="    $name: $python $fault"$'\n'
        done
    done
    say_error "there is no Python here that can make an environment:
${faults}Python 3.11, 3.12 or 3.13 with its module venv is needed. Debian 12, Ubuntu 24.04 and newer have one:
    sudo apt-get install python3-venv
PYTHON=/path/to/python3 chooses one at another place."
}

# Why this environment cannot be used as it is; nothing where it can. $2: the Python that it must be of, if any.
fault_of_environment() {
    local version
    if [ ! -e "$1" ]; then
        echo "not there"
    elif [ -e "$1/.unfinished" ]; then
        echo "left unfinished by an installation that was stopped"
    elif ! version=$(version_of "$1/bin/python"); then
        echo "does not run"
    elif is_too_old "$version"; then
        echo "of Python $version"
    elif [ -n "$2" ] && [ "$(base_of "$1/bin/python")" != "$2" ]; then
        echo "of another Python, $version"
    elif ! "$1/bin/python" -c 'import pip' 2>/dev/null && ! "$1/bin/python" -m ensurepip >/dev/null 2>&1; then
        echo "without pip" # others make them without it, such as uv, and then it is added
    fi
}

make_environment() {
    local folder=$1 python=${2:-} fault
    [ -z "$python" ] || python=$(find_python "$python")
    fault=$(fault_of_environment "$folder" "$python")
    if [ -n "$fault" ]; then
        python=${python:-$(find_python)}
        [ -n "$python" ] || exit 1
        [ ! -e "$folder" ] || [ -e "$folder/pyvenv.cfg" ] || [ -e "$folder/.unfinished" ] ||
            [ -z "$(ls -A "$folder")" ] || say_error "$folder is there, and is no virtual environment; VENV= names another folder"
        [ "$fault" = "not there" ] || echo "$folder: $fault; it is made anew"
        echo "$folder: Python $(version_of "$python"), $python"
        mkdir -p "$folder"
        touch "$folder/.unfinished"
        # The tokenizers are not of a Python, and stay.
        find "$folder/" -mindepth 1 -maxdepth 1 ! -name .unfinished ! -name tokenizers -exec rm -rf {} +
        "$python" -m venv "$folder"
        rm "$folder/.unfinished"
    fi
    [ -e "$folder/.python" ] || touch "$folder/.python"
}

install() {
    local folder=$1 code=0
    shift
    echo "$folder: pip install $*"
    trap 'exit 130' INT TERM # pip ends with 1 then, as it does for a mistake
    touch "$folder/.unfinished"
    # Of some hundred lines those stay that say what is being waited for.
    PYTHONUNBUFFERED=1 "$folder/bin/python" -m pip install --progress-bar=off "$@" | sed -nu \
        -e 's/^ *Downloading \(.*([0-9][0-9.]* GB)\).*/    downloading \1/p' \
        -e 's/^ *Downloading \(.*([0-9][0-9][0-9.]* MB)\).*/    downloading \1/p' \
        -e 's/^ *Building wheel.*/    building &/p' \
        -e 's/^Installing collected packages.*/    unpacking/p' || code=$?
    # Where pip fails it leaves what was there. Only one that was stopped leaves the mark.
    [ $code -gt 128 ] || rm "$folder/.unfinished"
    return $code
}

case "${1:-}" in
    find) find_python ${2:+"$2"} ;;
    make) make_environment "${@:2}" ;;
    install) install "${@:2}" ;;
    *) say_error "no such command: ${1:-}" ;;
esac
