# `bash scripts/launch.sh STEP RECIPE …` starts a step (step1_sft, step2_reward, step3_ppo, step2_dpo) with a recipe, whose path is
# relative to the root of the repository; the launchers call it. scripts/launch/__main__.py builds the command; --dry-run prints it.
# Sourced: `launch STEP RECIPE "$@"` does that, `launch_here STEP PLATFORM MODEL "$@"` takes the recipe of the device that is here, and
# `run_module MODULE "$@"` runs any other module of the project. PYTHON names another interpreter.
# Paths given on the command line are relative to the working directory, as everywhere.
launch() {
    local recipe=${2:-}
    [[ $recipe = /* ]] || recipe=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/$recipe || return
    run_module scripts.launch "${1:-}" "$recipe" "${@:3}"
}

launch_here() {
    local platform=$2
    case ${DS_ACCELERATOR:-$(command -v npu-smi)} in
        npu | */npu-smi) platform=ascend_910 ;;
        cpu) set -- "$@" --platform cpu ;;
    esac
    launch "$1" "configs/$platform/$3.yaml" "${@:4}"
}

run_module() {
    local root python
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || return
    if [[ -n ${PYTHON:-} ]]; then
        python=$PYTHON
    elif [[ -z ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} && -x $root/.venv/bin/python ]]; then
        python=$root/.venv/bin/python   # made by scripts/quickstart.sh
    else
        python=$(command -v python || command -v python3) || {
            echo "error: no python in the path; activate the environment, or name it: PYTHON=/path/to/python" >&2
            return 2
        }
    fi
    # exec: signals reach the program itself, and its exit code is the script's. Safe path: a models.py in the working
    # directory is not taken for ours.
    PYTHONSAFEPATH=1 PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m "$@"
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || launch "$@"
