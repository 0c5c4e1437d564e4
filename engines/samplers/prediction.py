"""What a model's output says of a sample = signal · x0 + sigma · ε, by its prediction type."""

from __future__ import annotations

from engines.errors import InvalidInput


def x0(prediction_type: str, signal: float, sigma: float) -> tuple[float, float]:
    """(u, v) with x0 = u · sample + v · model_output.

    Raises:
        InvalidInput: there is none: ε of a sample without signal says nothing of x0.
    """
    if prediction_type == "epsilon":
        if signal == 0:
            raise InvalidInput(
                "sampler",
                prediction_type,
                "the checkpoint's rescale_betas_zero_snr=True leaves no image in the first sample, "
                "where prediction_type='epsilon' cannot find one; use the sampler euler, "
                "euler_ancestral or dpmpp_2m",
            )
        return 1 / signal, -sigma / signal
    if prediction_type == "v_prediction":
        return signal, -sigma
    return 0.0, 1.0


def epsilon(prediction_type: str, signal: float, sigma: float) -> tuple[float, float]:
    """(u, v) with ε = u · sample + v · model_output."""
    if prediction_type == "epsilon":
        return 0.0, 1.0
    if prediction_type == "v_prediction":
        return sigma, signal
    return 1 / sigma, -signal / sigma
