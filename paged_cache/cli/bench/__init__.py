"""`paged-cache bench`: a module per group of measurements. Names of options and results are those of `vllm bench`."""

import typer

from .gpu import gpu
from .kernels import kernels
from .report import all_, report
from .scheduling import scheduling
from .serving import serve, throughput
from .steps import decode, latency, startup

app = typer.Typer(name="bench", help="Measure this package against its peers, on this machine.", no_args_is_help=True)
app.command()(decode)
app.command()(gpu)
app.command()(kernels)
app.command()(latency)
app.command()(scheduling)
app.command()(startup)
app.command()(throughput)
app.command()(serve)
app.command()(report)
app.command("all")(all_)
