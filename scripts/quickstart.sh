#!/usr/bin/env bash
# The first try: packages into .venv, then the demo model through SFT, reward model and PPO.
#   bash scripts/quickstart.sh [--seed N] [--output output/demo] [--threads N]
# The packages are fetched once; after that it runs without network.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh

prepare_venv requirements.txt
exec .venv/bin/python -m scripts.demo "$@"
