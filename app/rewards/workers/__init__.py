"""Worker processes that compute rewards within limits of time and memory."""
