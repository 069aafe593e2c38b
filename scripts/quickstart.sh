#!/usr/bin/env bash
# The first try: packages into .venv, then the demo model through SFT, reward model and PPO.
#   bash scripts/quickstart.sh [--seed N] [--output output/demo] [--threads N]
#   bash scripts/quickstart.sh --preset smollm2 [--seed N] [--output output/smollm2] [--threads N]     (docs/en/smollm2.md)
#   bash scripts/quickstart.sh --serve                       only the packages of the server and the page   (docs/en/serving.md)
# The packages are fetched once; after that it runs without network.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh

preset="" flags=()
while (($#)); do
    case "$1" in
        --serve) prepare_venv requirements-serve.txt && exit ;;
        -h | --help) sed -n '2,6s/^# //p' scripts/quickstart.sh && exit ;;
        --preset) preset=${2-} && shift $(($# > 1 ? 2 : 1)) ;;
        --preset=*) preset=${1#*=} && shift ;;
        *) flags+=("$1") && shift && continue ;;
    esac
    if [[ "$preset" != smollm2 ]]; then
        echo "error: --preset ${preset:-without a name}: there is smollm2; without --preset the demo runs." >&2
        exit 2
    fi
done

prepare_venv requirements.txt
if [[ "$preset" ]]; then
    add_packages "requirements-$preset.txt"
    exec .venv/bin/python -m "scripts.$preset" ${flags[@]+"${flags[@]}"}
fi
exec .venv/bin/python -m scripts.demo ${flags[@]+"${flags[@]}"}
