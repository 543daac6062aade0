"""Programs compiled ahead of time for accelerators that need not be present, and their cost.

`targets` makes the devices of a slice that is not there, `programs` compiles a training step or an attention for them,
`hlo` reads the text of the compiled program, `cost` counts its arithmetic, its memory traffic and its collectives, and
`chips` has the published peaks that turn these counts into times. All this is compiled, and nothing is run.
"""
