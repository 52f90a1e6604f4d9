"""Timelines of ranks brought together: what took the time of a step, and what need not have.

`record` keeps and writes those of a run, `load` reads them; `segments` says what a rank did at
every moment, `theory` what the same actions would have taken without losses. `events` and `picture`
show them.
"""
