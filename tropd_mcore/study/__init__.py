"""A study: the same students distilled by several objectives, with one result file per run and a page of tables.

    plan     the study's YAML file -> cells, each a complete set of overrides
    server   one rollout server for all cells of a model, in place of two per cell
    cell     one cell: prepare, train, evaluate
    result   the file of a cell
    tables   results -> tables of a page, with intervals over seeds
    curves   results -> pictures of a page

Runs are made by the commands `tropd train` and `tropd eval`, so that each can be repeated by hand.
"""
