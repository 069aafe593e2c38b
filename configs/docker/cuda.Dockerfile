# Sanbu for NVIDIA cards and for CPUs:   docker build -f configs/docker/cuda.Dockerfile -t sanbu:cuda .
# The base has torch and the CUDA toolkit that fits it (DeepSpeed compiles its operators with it at the first start);
# take the one with another CUDA for newer drivers: --build-arg BASE_IMAGE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-devel
# The project lies in /opt/sanbu; the volume with data, models and output is mounted at /workspace.
ARG BASE_IMAGE=pytorch/pytorch:2.13.0-cuda12.6-cudnn9-devel
FROM ${BASE_IMAGE}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
USER 0

# sshd and pdsh: DeepSpeedJob, and several nodes with the deepspeed launcher; OpenMPI: MPIJob. pdsh refuses to start if
# /usr/lib is not root's. Hosts are pods that come and go, so their keys are not remembered. StrictModes: the MPI operator mounts
# root's .ssh from a Secret, whose folder and links others may write to, and sshd would refuse the keys in it.
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

# Everything but torch, which the base brings; the constraint keeps pip from putting another build in its place.
COPY requirements.txt requirements-serve.txt /tmp/
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -c "import torch; print('torch==' + torch.__version__)" > /tmp/constraints.txt \
    && sed '/^torch==/d' /tmp/requirements.txt > /tmp/others.txt \
    && sed '/^-r /d' /tmp/requirements-serve.txt >> /tmp/others.txt \
    && python -m pip install --no-cache-dir --constraint /tmp/constraints.txt --requirement /tmp/others.txt \
    && python -c "import torch, deepspeed; assert torch.version.cuda, 'this is no CUDA build of torch'" \
    && rm /tmp/requirements*.txt /tmp/others.txt /tmp/constraints.txt

COPY . /opt/sanbu
RUN (getent passwd 1000 > /dev/null || useradd --create-home --uid 1000 sanbu) \
    && mkdir -p /workspace && chown 1000:1000 /workspace
ENV PYTHONPATH=/opt/sanbu PYTHONUNBUFFERED=1
WORKDIR /workspace
# DeepSpeedJob and MPIJob log in as root; their manifests say so. Everything else runs as this user.
USER 1000:1000
CMD ["bash"]
