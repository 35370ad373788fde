"""`tropd selftest`: proves on this machine, in minutes, what a job needs: loss, collectives, servers, weights, a step.

`material` makes two tiny models and the configuration of a job, `checks` runs the checks one after the other, each in
a process of its own, `collectives` is what the ranks of one of them run, and `report` writes the file to send back.
Nothing else imports this package.
"""
