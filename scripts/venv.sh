# Sourced by quickstart.sh and test.sh, in the root of the repository: the virtual environment .venv, made and filled when needed.

# supported PYTHON MODULES: succeed for a Python of a supported version that has the modules. A version manager's python3.12 may stand in the
# path without a Python behind it, so it is run, not only looked up.
supported() {
    "$1" -c "import sys, $2; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))" >/dev/null 2>&1
}

# Print the Python to use: $PYTHON where it is set, else the first in the path.
find_python() {
    local candidate candidates=${PYTHON:-python3.11 python3.12 python3.13 python3 python3.10}
    for candidate in $candidates; do
        if supported "$candidate" "venv, ensurepip"; then
            echo "$candidate"
            return
        fi
    done
    echo "error: none of $candidates is a Python 3.11, 3.12 or 3.13 (3.10 works too) with venv and ensurepip." \
        "Install one (Debian and Ubuntu: with its -venv package) or name it: PYTHON=/path/to/python bash $0" >&2
    return 2
}

# prepare_venv FILE: .venv exists and holds what FILE lists. The stamp in .venv remembers what was installed last, so that pip,
# and with it the network, is needed only when a requirements file changed.
prepare_venv() {
    local python stamp=".venv/.installed-$1" wanted
    if ! supported .venv/bin/python pip; then
        if [[ -n "$(ls -A .venv 2>/dev/null || true)" ]] && ! compgen -G ".venv/.installed-*" >/dev/null; then
            echo "error: .venv was not made by this script and has no Python 3.10 to 3.13 with pip (uv venv puts none in);" \
                "give it pip (uv venv --seed, python -m ensurepip), or move it away, and run the same command again." >&2
            exit 2
        fi
        python=$(find_python)
        echo "Making .venv with $("$python" --version)"
        "$python" -m venv --clear .venv
    fi
    wanted=$(cat requirements.txt $(sed -n 's/^-r //p' "$1") "$1" | sha256sum)
    if [[ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]]; then
        install "$1" "a few minutes"
        echo "$wanted" >"$stamp"
    fi
}

# add_packages FILE: .venv also holds exactly what FILE lists, and not what those packages list in turn (--no-deps).
add_packages() {
    local stamp=".venv/.installed-$1" wanted
    wanted=$(sha256sum <"$1")
    if [[ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]]; then
        install "$1" "about 100 MB" --no-deps
        echo "$wanted" >"$stamp"
    fi
}

# install FILE COST [PIP FLAGS]: what pip prints goes to a log, so that the terminal shows one line.
install() {
    local log=".venv/install-${1%.txt}.log"
    printf 'Installing the packages of %s into .venv (once; %s) ... ' "$1" "$2"
    if .venv/bin/python -m pip install --disable-pip-version-check "${@:3}" -r "$1" >"$log" 2>&1; then
        echo "done in $SECONDS s"
        return
    fi
    echo "failed"
    echo "error: the packages of $1 could not be installed; pip's reason is in $PWD/$log. With network, or with their wheels in" \
        "a folder and PIP_FIND_LINKS=FOLDER PIP_NO_INDEX=1, run the same command again." >&2
    exit 2
}
