"""Records to Weights & Biases, offline unless asked. No torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

Mode = Literal["offline", "online"]


class WandbSink:
    """One run of Weights & Biases. ``group`` joins it with others in the web page; ``run_id``: to go on with that one.

    Raises:
        RuntimeError: it does not start.
    """

    def __init__(
        self,
        *,
        mode: Mode,
        name: str,
        folder: Path,
        config: Mapping[str, Any],
        group: str | None = None,
        run_id: str | None = None,
    ) -> None:
        import wandb

        settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
        to_go_on: dict[str, Any] = {"id": run_id, "resume": "allow"} if run_id else {}
        try:
            self._run = wandb.init(
                project="cpt",
                name=name,
                group=group,
                dir=str(folder),
                mode=mode,
                config=dict(config),
                settings=settings,
                **to_go_on,
            )
        except wandb.errors.Error as error:
            raise RuntimeError(
                f"wandb does not start ({error}); log in, or set log.wandb=offline or disabled"
            ) from None
        self._run.define_metric("*", step_metric="step")  # its own counter never goes back, a run that rolls back does

    def write(self, record: Mapping[str, Any]) -> None:
        """Send one record; what is nested is named ``outer/inner``."""
        flat = {f"{k}/{n}": x for k, v in record.items() if isinstance(v, Mapping) for n, x in v.items()}
        self._run.log({**{k: v for k, v in record.items() if not isinstance(v, Mapping)}, **flat})

    def close(self) -> None:
        self._run.finish()
