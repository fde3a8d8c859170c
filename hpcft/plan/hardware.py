"""What is known of GPUs and links: speed, memory, bandwidth. Tables that a cluster profile overrides.

Everything here is a data sheet's or somebody's measurement, none of it this cluster's: predictions rest on it,
results do not.
"""

from __future__ import annotations

from hpcft.plan.prediction import Hardware

GIB = 2**30
# Of the memory on the data sheet, what a process can have: the rest is the driver's and error correction's. torch
# reports 79.1 of 80 GiB on an H100, 139.8 of 141 on an H200, 39.4 of 40 on an A100.
USABLE = 0.985

# Dense bf16 (fp16 where there is no bf16) peak of one GPU (one die of an MI250) in TFLOP/s, from the vendors' data
# sheets, without sparsity; the fastest form of each, SXM where there is one.
PEAK_TFLOPS: dict[str, float] = {
    "h100": 989, "h200": 989, "gh200": 989, "b200": 2250, "a100": 312, "a10": 125, "a40": 150, "l40s": 362, "l4": 121,
    "v100": 125, "t4": 65, "mi250": 181, "mi250x": 191.5, "mi300x": 1307, "mi300a": 981,
}  # fmt: skip
# Memory of one GPU (one die of an MI250) in GiB, from the data sheets. An A100 has 40 or 80, a V100 16 or 32, a GH200
# 96 or 144: those must be said.
GPU_GIB: dict[str, int] = {
    "h100": 80, "h200": 141, "b200": 180, "a10": 24, "a40": 48, "l40s": 48, "l4": 24, "t4": 16,
    "mi250": 64, "mi250x": 64, "mi300x": 192, "mi300a": 128,
}  # fmt: skip
# Bus bandwidth of large collectives inside a node, GB/s a GPU: about 80 % of one direction of NVLink (8 × H200
# measured: 361–367 of 450), of xGMI, or of PCIe where there is nothing else.
NODE_BANDWIDTH: dict[str, float] = {
    "h100": 360, "h200": 360, "gh200": 360, "b200": 720, "a100": 240, "v100": 120, "mi250": 80, "mi250x": 80,
    "mi300x": 300, "mi300a": 300,
}  # fmt: skip
PCIE = 20.0  # GB/s between GPUs that have no link of their own, PCIe 4 × 16
# One node to the others, GB/s: eight NDR400 adapters (46–48 each), four Slingshot ones of 200 Gb/s, one of 100 Gb/s.
FABRIC_BANDWIDTH: dict[str, float] = {"infiniband": 370, "slingshot": 90, "ethernet": 11, "loopback": 1}
# One GPU to its node's memory, GB/s, all GPUs at once: PCIe 5 × 16 measured on H200, else PCIe 4.
HOST_BANDWIDTH: dict[str, float] = {"h100": 55, "h200": 55, "b200": 55, "gh200": 300, "mi300a": 300}
HOST_PCIE = 22.0


def hardware(
    *,
    gpu_type: str | None,
    fabric: str,
    gpu_memory: float | None = None,
    node_memory: float | None = None,
    node_bandwidth: float | None = None,
    fabric_bandwidth: float | None = None,
) -> Hardware:
    """What a profile says, else what is usual for its GPU and fabric. Memory in GiB, bandwidths in GB/s."""
    kind = (gpu_type or "").lower()
    card = gpu_memory or GPU_GIB.get(kind)
    return Hardware(
        gpu_bytes=int(card * GIB * USABLE) if card else None,
        host_bytes=int(node_memory * GIB) if node_memory else None,
        node_bandwidth=float(node_bandwidth or NODE_BANDWIDTH.get(kind, PCIE)),
        fabric_bandwidth=float(fabric_bandwidth or FABRIC_BANDWIDTH[fabric]),
        host_bandwidth=float(HOST_BANDWIDTH.get(kind, HOST_PCIE)),
    )
