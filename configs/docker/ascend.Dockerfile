# Sanbu for Huawei Ascend 910:   docker build -f configs/docker/ascend.Dockerfile -t sanbu:ascend .
# The base has CANN 8.5.0 with the kernels of one chip, here 910b; for the first 910 take the tag of that chip:
# --build-arg BASE_IMAGE=…. torch and torch_npu have the same version, and CANN 8.5.0 goes with 2.9.0.
# The project lies in /opt/sanbu; the volume with data, models and output is mounted at /workspace.
ARG BASE_IMAGE=quay.io/ascend/cann:8.5.0-910b-ubuntu22.04-py3.11
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

# The wheels of torch_npu for x86_64 ask for the CPU build of torch by name: give PyTorch's CPU index, --build-arg TORCH_INDEX=URL.
ARG TORCH_INDEX=
ARG TORCH_VERSION=2.9.0
ARG TORCH_NPU_VERSION=2.9.0
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
RUN PIP_EXTRA_INDEX_URL="${TORCH_INDEX}" python -m pip install --no-cache-dir "torch==${TORCH_VERSION}" \
    && python -m pip install --no-cache-dir "torch-npu==${TORCH_NPU_VERSION}" pyyaml==6.0.3

COPY requirements.txt requirements-serve.txt /tmp/
RUN python -c "from importlib.metadata import version; print('torch==' + version('torch'))" > /tmp/constraints.txt \
    && sed '/^torch==/d' /tmp/requirements.txt > /tmp/others.txt \
    && sed '/^-r /d' /tmp/requirements-serve.txt >> /tmp/others.txt \
    && python -m pip install --no-cache-dir --constraint /tmp/constraints.txt --requirement /tmp/others.txt \
    && python -c "from importlib.metadata import version; assert version('torch').startswith('${TORCH_VERSION}'), 'torch was replaced'" \
    && rm /tmp/requirements*.txt /tmp/others.txt /tmp/constraints.txt

COPY . /opt/sanbu
# Sessions over ssh and `bash -c` read these two; CANN's variables are missing there otherwise.
RUN sed -i '1i source /opt/sanbu/scripts/vendor_env.sh' /etc/bash.bashrc && mkdir -p /workspace
# Not PYTHONPATH, which the vendor's file extends and the pods' variables would replace.
RUN printf "import sys; sys.path.insert(0, '/opt/sanbu')\n" \
    > "$(python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")/sanbu.pth"
ENV PYTHONUNBUFFERED=1 BASH_ENV=/opt/sanbu/scripts/vendor_env.sh
WORKDIR /workspace
CMD ["bash"]
