"""`python -m loadtests <command>`; each command says on its own help what it measures."""

from __future__ import annotations

import typer

from loadtests.capacity import capacity
from loadtests.clips import clips
from loadtests.day import day
from loadtests.decoders import decoders
from loadtests.encoding import encoding
from loadtests.engine import engine
from loadtests.gpu.command import gpu
from loadtests.laptop.command import laptop
from loadtests.live import live
from loadtests.overhead import overhead
from loadtests.overload import overload
from loadtests.peers.command import peers
from loadtests.plan import plan
from loadtests.simulate import simulate
from loadtests.soak import soak
from loadtests.switch import switch
from loadtests.tiles import tiles

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command()(capacity)
app.command()(clips)
app.command()(decoders)
app.command()(day)
app.command()(encoding)
app.command()(engine)
app.command()(gpu)
app.command()(laptop)
app.command()(live)
app.command()(overhead)
app.command()(overload)
app.command()(peers)
app.command()(plan)
app.command()(simulate)
app.command()(soak)
app.command()(switch)
app.command()(tiles)

if __name__ == "__main__":
    app()
