# Dots with vLLM on CUDA 13. Never built by the project, whose machines have neither Docker nor a GPU; the install line is
# resolved by a test. The host needs driver 580 or newer and the NVIDIA Container Toolkit.
#   docker build -t dots .
#   docker run --gpus all --ipc=host -v "$PWD":/work dots fit --config run.yaml
# --ipc=host: weights go to vLLM servers through /dev/shm. The devel image has nvcc, which FlashInfer compiles kernels with.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-dev python3-venv gcc g++ git \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/venv/bin:$PATH
COPY . /opt/dots
RUN python3 -m venv /opt/venv \
    && cd /opt/dots \
    && pip install --no-cache-dir -c constraints-gpu.txt -e '.[gpu]'
WORKDIR /work
ENTRYPOINT ["dots"]
