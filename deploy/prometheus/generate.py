"""Writes deploy/k8s/base/rules.yaml, the PrometheusRule of rules.yaml, by `make rules`.

tests/deploy/test_monitoring.py fails when it is not what the rules say.
"""

from pathlib import Path

RULES = Path(__file__).with_name("rules.yaml")
OBJECT = Path(__file__).parents[1] / "k8s" / "base" / "rules.yaml"

HEAD = """\
# Made of deploy/prometheus/rules.yaml by `make rules`: change that.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: rdev-api-alerts
  labels:
    app: rdev-api
spec:
"""


def text() -> str:
    """The whole file: the groups as they are, two columns further in."""
    groups = RULES.read_text().partition("\ngroups:\n")[2]
    lines = ["groups:", *groups.splitlines()]
    return HEAD + "".join(f"  {line}".rstrip() + "\n" for line in lines)


if __name__ == "__main__":
    OBJECT.write_text(text())
