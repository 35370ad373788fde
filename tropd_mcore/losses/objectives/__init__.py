"""The objectives: one function each, from per-token numbers of student and teacher to a loss.

Every one has the form

    loss of a token = - w A log p(x) + c D

with an advantage A (constant), a ratio w and a divergence D (both differentiable in the student) and a constant c; what
a method is, is its choice of A, c and D. Equation -> function -> test: docs/objectives.md.
"""
