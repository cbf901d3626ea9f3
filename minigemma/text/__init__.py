"""Between a model and text: generation, chat, scoring, prompts."""
