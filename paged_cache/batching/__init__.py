"""Many requests on one model and one pool: who is next, and how they run together.

`InputProcessor` makes requests, `Scheduler` plans steps, a `Forward` executes them, `OutputProcessor` chooses tokens;
`Engine` is one step after the other, `EngineLoop` lets threads use it, `ContinuousBatcher` is what people call.
"""
