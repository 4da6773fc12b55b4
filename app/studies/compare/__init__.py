"""`dots compare`: what each method needs to match plain GRPO, measured side by side on one machine."""
