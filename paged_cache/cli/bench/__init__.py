"""`paged-cache bench`: a module per group of measurements. Names of options and results are those of `vllm bench`."""

import typer

from .kernels import kernels
from .report import all_, report
from .scheduling import scheduling

app = typer.Typer(name="bench", help="Measure this package against its peers, on this machine.", no_args_is_help=True)
app.command()(kernels)
app.command()(scheduling)
app.command()(report)
app.command("all")(all_)
