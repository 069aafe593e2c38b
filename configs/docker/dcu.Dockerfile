# Sanbu for Hygon DCU (Z100L):   docker build -f configs/docker/dcu.Dockerfile -t sanbu:dcu .
# The base is the vendor's, with DTK 25.04 and its build of torch 2.4.1. Vendor wheels (deepspeed 0.14.2 of the DAS list)
# go into configs/docker/wheels before the build; without one DeepSpeed 0.14.4 comes from the package index, the oldest that
# imports with torch 2.4; its optimizers compile on the node. torch is never touched: a resolver that sees torch>=2 would
# put a CUDA build in its place.
# The project lies in /opt/sanbu; the volume with data, models and output is mounted at /workspace.
ARG BASE_IMAGE=image.sourcefind.cn:5000/dcu/admin/base/pytorch:2.4.1-ubuntu22.04-dtk25.04-py3.10
FROM ${BASE_IMAGE}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# The device files of the host belong to groups whose numbers differ by host, so the processes are root's.
# hadolint ignore=DL3002
USER 0

# StrictModes: the MPI operator mounts root's .ssh from a Secret, whose folder and links others may write to, and sshd would
# refuse the keys in it.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        g++ ninja-build numactl openmpi-bin openssh-client openssh-server pdsh \
    && rm -rf /var/lib/apt/lists/* \
    && mkdir -p /run/sshd /etc/ssh/ssh_config.d /etc/ssh/sshd_config.d \
    && chown root:root /usr/lib \
    && printf 'Host *\n    StrictHostKeyChecking no\n    UserKnownHostsFile /dev/null\n    LogLevel ERROR\n' \
        > /etc/ssh/ssh_config.d/sanbu.conf \
    && printf 'StrictModes no\n' > /etc/ssh/sshd_config.d/sanbu.conf

COPY configs/docker/wheels/ /tmp/wheels/
# transformers of requirements.txt does without torch before 2.6.
COPY requirements-oldest.txt requirements-serve.txt /tmp/
COPY scripts/vendor_env.sh /opt/sanbu/scripts/vendor_env.sh
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 DS_BUILD_OPS=0
# Vendor wheels first and without their dependencies; then everything else under a constraint that names this torch.
# DeepSpeed 0.14.2 is what DTK 25.04 ships; it and torch leave the list of the package index, and so does numpy: the launcher of
# 0.14.2 imports what numpy 2 has removed.
RUN . /opt/sanbu/scripts/vendor_env.sh \
    && python -c "from importlib.metadata import version; print('torch==' + version('torch'))" > /tmp/constraints.txt \
    && echo 'numpy<2' >> /tmp/constraints.txt \
    && find /tmp/wheels -name '*.whl' -print0 \
        | xargs --null --no-run-if-empty python -m pip install --no-cache-dir --no-deps \
    && sed -E '/^(torch|deepspeed|numpy|pytest.*)==/d' /tmp/requirements-oldest.txt > /tmp/others.txt \
    && sed '/^-r /d' /tmp/requirements-serve.txt >> /tmp/others.txt \
    && python -m pip install --no-cache-dir --constraint /tmp/constraints.txt --requirement /tmp/others.txt \
    && (python -m pip show --quiet deepspeed || python -m pip install --no-cache-dir --no-deps deepspeed==0.14.4) \
    && python -c "import torch; assert torch.version.hip, 'torch is no longer the build of DTK'" \
    && DS_ACCELERATOR=cuda python -c "import deepspeed.launcher.runner" \
    && rm -r /tmp/wheels /tmp/requirements*.txt /tmp/others.txt /tmp/constraints.txt

COPY . /opt/sanbu
# Sessions over ssh and `bash -c` read these two; DTK's variables are missing there otherwise.
RUN sed -i '1i source /opt/sanbu/scripts/vendor_env.sh' /etc/bash.bashrc && mkdir -p /workspace
# Not PYTHONPATH, which the vendor's file extends and the pods' variables would replace.
RUN printf "import sys; sys.path.insert(0, '/opt/sanbu')\n" \
    > "$(python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")/sanbu.pth"
ENV PYTHONUNBUFFERED=1 BASH_ENV=/opt/sanbu/scripts/vendor_env.sh
WORKDIR /workspace
CMD ["bash"]
