"""The date that chat templates print in commands other than training: the date of the run, if it has one.

Training does not use this module (see `train.loaded_inputs`). Invariant: a command does not change what the run has
recorded.
"""

from __future__ import annotations

import logging
from datetime import date

from tropd_mcore.config.schema import Config
from tropd_mcore.records.run_dir import RunDir

log = logging.getLogger(__name__)


def template_date(config: Config, stored: date | None = None) -> date:
    """Return data.template_date, else the day that the run in run.dir has recorded, else `stored`, else today.

    `stored` is the day of the work that the command continues. Raises DataError.
    """
    if config.data.template_date is not None:
        return config.data.template_date
    recorded = RunDir(config.run.dir).recorded_template_date()
    day = recorded or stored or date.today()
    source = f"that of {config.run.dir}" if recorded else "that of what is stored" if stored else "today"
    log.info("a date in a chat template is %s, %s", day, source)
    return day
