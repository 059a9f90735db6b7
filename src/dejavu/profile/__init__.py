"""What a model does on text: densities, similarities, norms, attention, quality; statistics and figures.

`run.profile` is the whole job. `observer` looks into forward passes and feeds the accumulators, one file a theme:
`oracle`, `activity`, `states`; `attention` and `quality` stand beside them. `state` makes the job resumable,
`summary` turns sums into the numbers of profile.json, `figures` and `page` show nothing but those numbers.
"""
