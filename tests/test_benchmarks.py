"""The benchmarks: arithmetic against published tables, data, verdicts, and a rehearsal of our side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import device, kernels, table
from benchmarks.cases import CASES, EVERY, OURS, Case, merged
from benchmarks.kernels import Kernel
from benchmarks.made import MEAN_DOCUMENT, Windows, document_lengths, prompt_length
from benchmarks.numbers import (
    Work,
    disagreement,
    least_bytes,
    linear_weights,
    mfu,
    percentile,
    roofline,
    roofline_speed,
    span,
    token_flop,
)
from benchmarks.peers import PEERS, batches
from benchmarks.speed import fitting
from benchmarks.stopwatch import FEWEST_TIMED, FEWEST_WARM, Limits, Stopwatch
from benchmarks.task import Task
from hpcft.data.kinds import Kind

ROOT = Path(__file__).resolve().parent.parent


def shape(model: str) -> Any:
    return next(case.shape for case in EVERY.values() if case.model == model)


@pytest.mark.parametrize(
    ("model", "length", "rank", "gigaflop"),
    [
        ("llama-8b", 4096, 0, 48.25),
        ("llama-8b", 8192, 0, 51.47),
        ("llama-8b", 4096, 16, 33.24),
        ("qwen-7b", 4096, 16, 30.75),
        ("qwen-1.5b", 2048, 0, 9.79),
        ("qwen-0.5b", 2048, 0, 3.23),
    ],
)
def test_the_flop_of_a_token_are_those_of_the_shape(model: str, length: int, rank: int, gigaflop: float) -> None:
    assert token_flop(Work(shape(model), length, rank)) / 1e9 == pytest.approx(gigaflop, abs=0.006)


def test_a_published_speed_gives_the_published_utilisation() -> None:
    """8B, whole documents of 4096: 12,412 tokens/s on an H100 are 60.6 %, 56.5 % of it in matrices."""
    work = Work(shape("llama-8b"), 4096)
    assert linear_weights(work.shape) == pytest.approx(7.505e9, rel=1e-3)
    assert mfu(work, 12412, "h100") == pytest.approx(0.606, abs=5e-4)
    assert mfu(work, 12412, "h100", attention=False) == pytest.approx(0.565, abs=5e-4)
    assert mfu(work, 12412, "an-unknown-card") is None


@pytest.mark.parametrize(
    ("model", "length", "rank", "gpu", "micros"),
    [
        ("llama-8b", 4096, 0, "h100", 79.6),
        ("llama-8b", 8192, 0, "h100", 86.0),
        ("llama-8b", 4096, 16, "h100", 64.1),
        ("llama-8b", 4096, 16, "h200", 1e6 / 16400),
        ("qwen-7b", 4096, 16, "h100", 59.5),
        ("qwen-1.5b", 4096, 0, "h100", 19.8),
        ("qwen-0.5b", 2048, 0, "h100", 7.8),
    ],
)
def test_the_roofline_is_the_table_that_it_was_calibrated_as(
    model: str, length: int, rank: int, gpu: str, micros: float
) -> None:
    work = Work(shape(model), length, rank)
    assert sum(roofline(work, gpu).values()) == pytest.approx(micros, rel=0.01)
    assert roofline_speed(work, gpu) == pytest.approx(1e6 / micros, rel=0.01)


def test_short_documents_make_the_roofline_higher_by_attention_alone() -> None:
    long, short = (roofline(Work(shape("qwen-7b"), reach, 8), "h100") for reach in (8192, 450))
    assert {name for name in long if long[name] != short[name]} == {"attention"}
    assert short["attention"] < 0.2 * long["attention"]


def test_four_bits_and_a_reference_cost_what_they_add() -> None:
    plain, packed = (Work(shape("llama-8b"), 4096, 16, quantised=q) for q in (False, True))
    assert roofline(packed, "h100")["four bits"] == pytest.approx(1.45, abs=0.02)  # at 8192 tokens a forward pass
    both = Work(shape("llama-8b"), 4096, 16, reference=True)
    assert token_flop(both, attention=False) == 1.5 * token_flop(plain, attention=False)


def test_what_cannot_fit_is_known_before_it_is_tried() -> None:
    work = Work(shape("llama-8b"), 4096, 16)
    assert least_bytes(work, 8192) < 80e9 < least_bytes(work, 16384)
    assert least_bytes(Work(shape("llama-8b"), 4096), 4096) > 120e9  # 16 bytes of every weight


def test_the_95th_percentile_of_twenty_is_the_second_largest() -> None:
    assert percentile(list(range(20, 0, -1)), 0.95) == 19
    assert percentile([3.0], 0.95) == 3.0


def test_losses_that_agree_count_and_others_are_named() -> None:
    ours = ([2.0, 1.9], [1.0, 1.1])
    assert disagreement(ours, ([2.001, 1.9], [1.02, 1.1])) == ""
    assert disagreement(ours, ([2.0, 1.9], [float("nan")] * 2)) == ""
    assert disagreement(ours, ([2.0, 1.8], [1.0, 1.1])) == "loss of step 2: 1.8000, ours 1.9000"
    assert disagreement(ours, ([2.0, 1.9], [1.2, 1.1])) == "gradient norm of step 1: 1.2000, ours 1.0000"
    assert disagreement(ours, ([float("nan"), 1.9], [1.0, 1.1])).startswith("loss of step 1")
    assert disagreement(ours, ([], [])) == "no loss to compare"


def test_windows_are_full_and_their_documents_have_the_lengths_of_instructions() -> None:
    case = CASES["7b-lora-short"]
    windows = Windows(50, case.length, case.vocabulary, case.documents)
    lengths = [n for index in range(len(windows)) for n in windows[index].documents]
    assert all(sum(windows[index].documents) == case.length == len(windows[index].tokens) for index in range(50))
    assert len(lengths) == 50 * case.documents
    assert min(lengths) >= 8
    assert np.mean(lengths) == pytest.approx(MEAN_DOCUMENT, rel=0.05)
    assert np.std(lengths) == pytest.approx(np.mean(lengths), rel=0.15)  # as exponential ones: many short, few long
    assert span(lengths) == pytest.approx(2 * np.mean(lengths), rel=0.15)
    assert windows.trained_tokens(0) == case.length - case.documents
    again = Windows(50, case.length, case.vocabulary, case.documents)[7]
    assert np.array_equal(again.tokens, windows[7].tokens)
    assert not np.array_equal(again.tokens, windows[8].tokens)
    assert document_lengths(np.random.default_rng(0), 4096, 1) == [4096]


def test_the_answers_of_a_pair_share_a_prompt_that_is_not_trained() -> None:
    window = Windows(3, 512, 1000, 8, pairs=True)[2]
    starts = np.cumsum([0, *window.documents])
    assert window.kinds == [Kind.CHOSEN, Kind.REJECTED] * 4
    for chosen in range(0, 8, 2):
        prompt = prompt_length(window.documents, chosen)
        first, second = (slice(s, s + prompt) for s in starts[chosen : chosen + 2])
        assert prompt
        assert np.array_equal(window.tokens[first], window.tokens[second])
        assert not window.trained[first].any()
        assert window.trained[starts[chosen] + prompt : starts[chosen + 1]].all()
    with pytest.raises(ValueError, match="no pairs"):
        Windows(1, 512, 1000, 7, pairs=True)


@pytest.mark.parametrize("name", EVERY)
def test_every_contestant_of_a_case_exists_and_its_batches_make_whole_steps(name: str) -> None:
    case: Case = EVERY[name]
    assert case.ours
    assert set(case.ours) <= OURS.keys()
    assert set(case.peers) <= PEERS.keys()
    for who in case.peers:
        peer, task = PEERS[who], Task("", name, who, case.gpus[-1], True)
        share = case.windows * (1 if peer.packed else case.documents // (2 if case.pairs else 1))
        tried = batches(task, peer)
        assert tried
        assert sorted(tried, reverse=True) == tried
        assert all(share % rows == 0 for rows in tried)
        assert peer.fill or tried[0] == min(peer.rows, share)  # a default batch as it is


def test_of_a_word_said_twice_the_later_one_holds() -> None:
    assert merged("--tp 4 --strategy ddp", "--quiet", "--tp 1") == ["--tp", "1", "--strategy", "ddp", "--quiet"]


def test_a_slow_contestant_is_timed_over_fewer_steps() -> None:
    watch = Stopwatch(Limits(warmup=10, steps=20, seconds=0.0), "cpu", first=True)
    ended = [watch.ended() for _ in range(FEWEST_WARM + FEWEST_TIMED)]
    assert ended == [False] * (len(ended) - 1) + [True]
    assert len(watch.seconds()) == FEWEST_TIMED
    quick = Stopwatch(Limits(warmup=4, steps=6, seconds=60.0), "cpu", first=True)
    assert [quick.ended() for _ in range(10)].index(True) == 9
    assert len(quick.seconds()) == 6
    assert sum(quick.seconds()) <= quick.wall


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "GEMM"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>", "GEMM"),
        ("aten::mm", "GEMM"),
        ("aten::mul", "elementwise"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<128>>", "attention"),
        ("void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float, LogSoftMaxForwardEpilogue>", "CE"),
        ("triton_red_fused__log_softmax_nll_loss_forward_3", "CE"),
        ("triton_poi_fused__to_copy_mul_silu_2", "elementwise"),
        ("triton_tem_fused_mm_4", "GEMM"),
        ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>", "copies and casts"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("Memcpy PtoP (Device -> Device)", "communication"),
        ("Memcpy DtoD (Device -> Device)", "copies and casts"),
        ("c10d::symmetric_memory::barrier_kernel(unsigned int**, int, int, int, unsigned long)", "communication"),
    ],
)
def test_a_kernel_is_known_by_its_name(name: str, group: str) -> None:
    assert kernels.group_of(name) == group


def test_time_on_the_device_is_shared_out_once() -> None:
    ran = [
        Kernel("nvjet_tst_192x192", 0.0, 4.0),
        Kernel("void pytorch_flash::flash_fwd_kernel", 4.0, 5.0),
        Kernel("ncclDevKernel_ReduceScatter_Sum_f32", 4.5, 6.0),
        Kernel("triton_poi_fused_mul_silu_0", 6.0, 6.5),
        Kernel("triton_red_fused__log_softmax_nll_loss_1", 6.5, 7.0),
        Kernel("vectorized_elementwise_kernel", 8.0, 8.5),
    ]
    found = kernels.shares(ran, [Kernel(kernels.OPTIMIZER, 7.9, 9.0)], wall=10.0)
    assert found == pytest.approx(
        {"GEMM": 4, "attention": 1, "elementwise": 0.5, "CE": 0.5, "optimizer": 0.5, "communication": 1, "idle": 2.5}
    )
    beside = [Kernel("gemm", 0.0, 2.0), Kernel("Memcpy HtoD memcpy", 0.0, 2.0)]
    assert kernels.shares(beside, [], wall=2.0)["GEMM"] == pytest.approx(1.0)  # of two streams each has its half
    assert "| GEMM | 2000.0 | 40.0% |" in kernels.table(found, steps=2)


def record(who: str, wall: float, losses: list[float], **other: Any) -> dict[str, Any]:
    case = CASES["8b-lora-4096"]
    return {
        "case": "8b-lora-4096", "contestant": who, "gpus": 1, "ours": who in OURS, "about": who, "run": "2026-01-01",
        "gpu": "h100", "tokens": case.windows * case.length, "lengths": [4096], "trained": 1.0, "losses": losses,
        "norms": [1.0] * len(losses), "micro": 2, "seconds": [wall / 10] * 10, "wall": wall, "timed": 10, "warmup": 3,
        "first_step": 9.0, "peak": 50 * 2**30, "reserved": 55 * 2**30, **other,
    }  # fmt: skip


def test_a_gap_is_named_by_the_kernels_around_it_and_not_by_one_that_has_ended_long_before() -> None:
    ran = [Kernel("a", 0, 5), Kernel("b", 1, 2), Kernel("c", 6, 7), Kernel("a", 9, 10), Kernel("c", 10, 11)]
    assert kernels.gaps(ran) == [("c", "a", 1, 2), ("a", "c", 1, 1)]
    assert kernels.gaps(ran, most=1) == [("c", "a", 1, 2)]


def test_a_ratio_is_that_of_our_fastest_run_and_only_of_the_same_training() -> None:
    records = [
        record("us-defaults", 20.0, [12.0] * 5),
        record("us", 13.1072, [12.0] * 5),
        record("trl", 26.2144, [12.0] * 5),
        record("hf", 1.0, [11.0] * 5),
        {**record("trl-tuned", 0, []), "failed": "…\ntorch.OutOfMemoryError: CUDA out of memory. /a/b/c.py"},
    ]
    rows = [table.row(r, records) for r in records]
    assert "| 12,500 (12,500) | 42.0% (37.9%) | 0.80 | 50.0, 55.0 |" in rows[1]
    assert rows[2].endswith("| **2.00** |")
    assert "**differs**: loss of step 1: 11.0000, ours 12.0000" in rows[3]
    assert "does not count" in rows[3]
    assert rows[3].endswith("| – |")
    assert "did not run: out of memory" in rows[4]
    assert {row.count("|") for row in rows} == {len(table.COLUMNS) + 1}
    assert table.counted(record("trl", 1.0, [12.0]), [record("trl", 1.0, [12.0])]).startswith("no run of ours")
    assert table.clean("x\nImportError: no /home/me/lib/thing.so | here") == "ImportError: no thing.so / here"


def test_a_peer_of_another_precision_is_compared_with_ours_of_that_precision() -> None:
    records = [
        record(who, wall, [12.0] * 5) for who, wall in (("us", 20.0), ("us-bf16", 10.0), ("trl-varlen-bf16", 11.0))
    ]
    assert table.row(records[2], records).endswith("| **1.10** |")
    assert table.row(records[2], records[::2]).endswith("| – |")


def test_several_gpus_are_compared_with_one() -> None:
    records = [record("us", 10.0, [12.0]), record("us", 10.5, [12.0], gpus=4, tokens=4 * 16384)]
    assert table.scaling(records) == ["8b-lora-4096, us: 4 GPUs, each 0.952 of one alone."]


@pytest.mark.slow
def test_our_side_of_the_harness_runs_and_its_section_says_how(tmp_path: Path) -> None:
    words = ["--folder", str(tmp_path), "--cpu", "--cases", "tiny", "--who", "us", "--warmup", "3", "--steps", "5"]
    page = tmp_path / "page.md"
    call = [sys.executable, "-W", "ignore", "-m", "benchmarks.speed", *words, "--profile", "--append", str(page)]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (facts,) = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert facts["timed"] == len(facts["seconds"]) == 5
    assert facts["tokens"] == 2 * 256
    assert all(5.5 < loss < 7 for loss in facts["losses"])  # ln 512 = 6.24
    assert facts["kernels"]["GEMM"] > 0
    assert facts["kernels"]["optimizer"] > 0
    section = page.read_text()
    assert "python -m benchmarks.speed --folder SCRATCH --cpu --cases tiny" in section
    assert "| tiny | us | 1 |" in section
    assert str(tmp_path) not in section
    assert "| GEMM |" in section


def test_what_nvidia_smi_says_is_read_and_decides_which_batches_are_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"name": "NVIDIA H100 80GB HBM3", "driver_version": "580.1", "clocks.sm": "1755", "clocks.max.sm": "1980",
               "power.draw": "[N/A]", "power.limit": "700.00", "memory.total": "81559"}  # fmt: skip
    program = tmp_path / "nvidia-smi"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nfields = sys.argv[1].split('=')[1].split(',')\n"
        f"for _ in range(2):\n    print(', '.join({answers!r}[f] for f in fields))\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    setting = device.facts(cpu=False)
    assert device.said(setting).startswith("2 × NVIDIA H100 80GB HBM3, driver 580.1, at most 1980 MHz and 700.00 W; ")
    assert device.kind_of(setting["device"]) == "h100"
    clocks = device.Clocks()
    clocks.seen += device.gpu_query(("clocks.sm", "power.draw"))
    assert clocks.ended() == {"clock": 1755.0}  # a card that does not tell its power
    tried = [fitting(Task("", "7b-lora-short", who, 1, False), setting) for who in ("trl-varlen", "trl-tuned", "trl")]
    assert tried == [[1], [1], [8, 1]]  # two windows of 8192 take 91 GB
    assert fitting(Task("", "1.5b-full-short", "trl-varlen", 1, False), setting) == [2, 1]
