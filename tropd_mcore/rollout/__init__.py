"""Samples rollouts from an SGLang server and sends the student's weights to it."""
