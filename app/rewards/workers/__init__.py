"""The processes that compute rewards, with limits on their time and memory."""
