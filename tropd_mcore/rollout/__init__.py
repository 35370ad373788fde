"""Student continuations from an SGLang server, and the student's weights on their way there."""
