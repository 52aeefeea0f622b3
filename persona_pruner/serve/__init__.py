"""An OpenAI-compatible server of many characters on one base model (extra `serve`)."""
