"""A server of a checkpoint and its adapters, in OpenAI's interface: `jsublim serve`."""
