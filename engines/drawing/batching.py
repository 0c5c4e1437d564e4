"""How many rows share an engine call where nobody says: by the pixels that they are worth.

A denoise call of eight rows fills a GPU, whatever their size: latents are small. Decoding holds
many features for every pixel, so it is bounded by memory; and on a CPU, where a call takes nearly
as long as its rows one after the other, both are bounded by time: by about one image of 512 px.
There a row of a decode costs no less in company, which would only wait for it.
"""

from __future__ import annotations

FULL_BATCH = 8
CPU_DECODE_ROWS = 2  # p95 a tenth lower than with eight, at 65 % load and the same throughput
CUDA_DECODE_ROWS = 4  # SD 1.5 on an H200: 5.3 ms a row as with eight, 5.6 alone; steps wait for it
CALL_PIXELS = {"cpu": 512 * 512, "cuda": FULL_BATCH * 512 * 512}
# Eight rows of 1024 px squared reach 2^31 elements at the VAE's last level (256 features a pixel):
# more memory than is well spent, and more than some kernels can count.
MAX_DECODE_PIXELS = FULL_BATCH * 512 * 512


def denoise_rows(device: str, size_px: int) -> int:
    """Lanes of a denoise call of images of ``size_px`` squared; at least the two of guidance.

    Each frame of a clip counts as one (`Drawing.num_pictures`).
    """
    return max(2, _rows(device, size_px) if device == "cpu" else FULL_BATCH)


def decode_rows(device: str, size_px: int, max_batch: int) -> int:
    """Pictures of a decode call, and no more than those of a denoise call."""
    at_most = CPU_DECODE_ROWS if device == "cpu" else CUDA_DECODE_ROWS
    return min(max_batch, at_most, _rows(device, size_px))


def rows_that_fit(num_pixels: int) -> int:
    """The most pictures of so many pixels that the VAE is given at a time, whatever is asked."""
    return max(1, MAX_DECODE_PIXELS // num_pixels)


def _rows(device: str, size_px: int) -> int:
    return max(1, min(FULL_BATCH, CALL_PIXELS[device] // size_px**2))
