"""An encoder that is put into 8 bits as it is read takes little more memory than it has weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from transformers import T5Config, T5EncoderModel

LOAD = """
import sys, torch, transformers
from pathlib import Path
from engines.build.t5 import load_t5_int8
def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))
transformers.T5EncoderModel(transformers.T5Config(d_model=8, num_layers=1, vocab_size=8))
Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
before = resident("VmRSS")
model = load_t5_int8(Path(sys.argv[1]), torch.float16)
held = sum(w.numel() * w.element_size() for w in model.parameters())
print(held, resident("VmHWM") - before)
"""


def test_loading_needs_no_twice_the_memory(tmp_path: Path) -> None:
    config = T5Config(
        vocab_size=1000, d_model=512, d_kv=64, d_ff=2048, num_layers=16, num_heads=8,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    T5EncoderModel(config).save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path)], capture_output=True, text=True, check=True
    )
    held, peak = map(int, done.stdout.split())
    assert held < 0.3 * (tmp_path / "model.safetensors").stat().st_size  # of float32
    assert peak < 2 * held
