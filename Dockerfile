# megachat on NVIDIA's PyTorch image, whose torch, Transformer Engine, flash-attention, apex, NCCL and cuDNN are built
# for each other.
# The digest fixes its content, on x86_64 and aarch64: a tag alone may be moved.
# 26.06 has torch 2.13, as launch/setup.sh installs, on CUDA 13: the host needs a driver R580 or newer.
#
#   docker build -t megachat .
#   docker run --rm --gpus all megachat          # the doctor: what is installed, what a run would choose, what is wrong
#   docker run --rm --gpus all --ipc=host --ulimit memlock=-1 \
#       -v "$PWD/data:/workspace/megachat/data" -v "$PWD/runs:/workspace/megachat/runs" \
#       megachat deepspeed launch/pretrain.py --config configs/d24_fp8.json
FROM nvcr.io/nvidia/pytorch:26.06-py3@sha256:43c018d6a12963f1a1bad85ef8574b5c2a978eec2be0ebcacfb87f69e0d210e1

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# ssh and pdsh start ranks on several hosts (launch/hostfile.sh)
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        iproute2 openssh-client openssh-server pdsh python3-venv \
    && rm -rf /var/lib/apt/lists/*

# An environment over the image's packages, with the image's own mpirun.
RUN python -m venv --system-site-packages /opt/megachat && ln -s "$(command -v mpirun)" /opt/megachat/bin/mpirun
ENV PATH=/opt/megachat/bin:$PATH
WORKDIR /workspace/megachat

# The image's packages keep their versions: pip may only add. Packages are installed before the code is copied, so that
# a change of the code does not install them again.
COPY setup.py pyproject.toml ./
RUN python -m pip list --format=freeze >/opt/image-packages.txt \
    && mkdir megachat && touch megachat/__init__.py \
    && python -m pip install --no-cache-dir --constraint /opt/image-packages.txt \
        -e '.[hf,mpi,wandb]' pytest pytest-xdist \
    && python -m pip list --format=freeze >/opt/all-packages.txt \
    && python -c 'before, after = (set(open(f"/opt/{name}-packages.txt")) for name in ("image", "all")); assert before <= after, before - after'

COPY . .

# An image is built without a GPU, so these are the CPU tests; bash tests/run_gpu.sh runs on a machine that has one.
RUN python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# The image's entry point stays: it checks the driver and runs the given command.
CMD ["python", "tools/doctor.py"]
