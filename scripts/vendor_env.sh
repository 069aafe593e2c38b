#!/bin/bash
# Runs a command in the environment of the vendor's toolkit, DTK or CANN, where one is installed:
#   bash scripts/vendor_env.sh python -m scripts.pod …
# Sourced it only sets the environment. No `set -u`: the vendors' files read unset variables.
if [[ -z ${SANBU_VENDOR_ENV:-} ]]; then   # once: every `bash -c` of the images comes here (BASH_ENV)
    for sanbu_file in \
        "${DTK_HOME:-/opt/dtk}/env.sh" \
        "${ASCEND_HOME:-/usr/local/Ascend}/ascend-toolkit/set_env.sh" \
        "${ASCEND_HOME:-/usr/local/Ascend}/nnae/set_env.sh"; do
        if [[ -r $sanbu_file ]]; then
            source "$sanbu_file"
            break   # nnae is the runtime alone, for machines without the toolkit
        fi
    done
    for sanbu_folder in /opt/hyhal/lib /usr/local/Ascend/driver/lib64/common /usr/local/Ascend/driver/lib64/driver; do
        if [[ -d $sanbu_folder && :${LD_LIBRARY_PATH:-}: != *:$sanbu_folder:* ]]; then
            export LD_LIBRARY_PATH=$sanbu_folder${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}   # the host's driver, mounted
        fi
    done
    unset sanbu_file sanbu_folder
    export SANBU_VENDOR_ENV=1
fi
if [[ ${BASH_SOURCE[0]} == "$0" && $# -gt 0 ]]; then
    exec "$@"
fi
