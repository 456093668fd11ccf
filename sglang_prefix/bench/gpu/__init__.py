"""One run for scarce GPU minutes: what is carried, the steps, and what their results change."""
