"""The student: loading, rendering, generating, scoring and updating. The only package, beside losses, with torch."""
