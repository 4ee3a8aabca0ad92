// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/ca"
)

func (s *session) activityVerifyCommand() *cobra.Command {
	var offline bool
	cmd := &cobra.Command{
		Use:   "verify [FILE ...]",
		Short: "Tell whether the audit logs are whole",
		Long: `Tell whether the audit logs are whole.

Without FILE every replica of meshd reads its own log: each line has the hash of
the one before, and heads of the logs are kept in etcd every minute. So a line
that was changed, removed or inserted is found, and a log that was cut short or
written anew.

With FILE it is this program that reads copies of logs (audit.jsonl of the data
directory), and meshd is only asked for the heads; with --offline for nothing,
which does not notice a log that was cut short.

The exit code is 3 if a log is not whole.`,
		Example: `  mesh activity verify
  mesh activity verify audit.jsonl
  mesh activity verify --offline /mnt/evidence/audit.jsonl`,
		RunE: func(cmd *cobra.Command, args []string) error { return s.verifyActivity(cmd.Context(), args, offline) },
	}
	s.addOutputFlags(cmd)
	cmd.Flags().BoolVar(&offline, "offline", false, "ask meshd for nothing; with FILE only")
	return cmd
}

// The states of a log, as the API words them.
const (
	logWhole  = "whole"
	logBroken = "broken"
)

func (s *session) verifyActivity(ctx context.Context, files []string, offline bool) error {
	report := &api.ActivityReport{ApiVersion: api.Version, Kind: "ActivityReport"}
	if offline && len(files) == 0 {
		return usagef("--offline: name the files to verify")
	}
	if !offline {
		err := s.call(ctx, "cannot verify the activity", func(ctx context.Context, c *connection) (err error) {
			report, err = c.VerifyActivity(ctx, &api.VerifyActivityRequest{})
			return err
		})
		if err != nil {
			return err
		}
	}
	if len(files) > 0 {
		known := report.GetLogs()
		report.Logs = nil
		for _, path := range files {
			log, err := verifyFile(path, known, offline)
			if err != nil {
				return err
			}
			report.Logs = append(report.Logs, log)
		}
	}
	if err := s.print(s.logListing(report)); err != nil {
		return err
	}
	for _, log := range report.GetLogs() {
		if log.GetState() == logBroken {
			return errFindings
		}
	}
	return nil
}

// verifyFile reads a copy of a log; known are the logs whose heads meshd has.
func verifyFile(path string, known []*api.AuditLog, offline bool) (*api.AuditLog, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	out := &api.AuditLog{Replica: path, State: logBroken}
	if out.Id, err = ca.IdentifyAudit(file); err != nil {
		out.Message = err.Error()
		return out, nil
	}
	var marks []ca.AuditMark
	for _, log := range known {
		if log.GetId() != out.GetId() {
			continue
		}
		out.Marks = log.GetMarks()
		for _, m := range log.GetMarks() {
			marks = append(marks, ca.AuditMark{
				Time:      m.GetTime().AsTime(),
				AuditHead: ca.AuditHead{Sequence: m.GetLine(), Hash: m.GetHash(), Size: m.GetSize()},
			})
		}
	}
	if _, err := file.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	head, err := ca.CheckAudit(file, marks)
	out.Lines, out.Head = head.Sequence, head.Hash
	switch {
	case err != nil:
		out.Message = err.Error()
	case len(marks) == 0 && !offline:
		out.Message = "meshd has kept no head of this log: is it one of this mesh, with its first line?"
	default:
		out.State = logWhole
	}
	return out, nil
}

func (s *session) logListing(report *api.ActivityReport) *listing {
	l := &listing{object: report, empty: "there is no audit log", table: table{columns: []column{
		{head: "REPLICA"}, {head: "STATE"}, {head: "LINES", right: true}, {head: "HEADS", right: true}, {head: "LAST HEAD"},
		{head: "LOG", wide: true}, {head: "MESSAGE"},
	}}}
	for _, log := range report.GetLogs() {
		tone := map[string]tone{logWhole: green, logBroken: red}[log.GetState()]
		last := ""
		if n := len(log.GetMarks()); n > 0 {
			last = s.age(log.GetMarks()[n-1].GetTime()) + " ago"
		}
		l.table.rows = append(l.table.rows, []cell{
			{text: log.GetReplica()}, {text: log.GetState(), tone: tone}, {text: strconv.FormatUint(log.GetLines(), 10)},
			{text: fmt.Sprint(len(log.GetMarks()))}, {text: last}, {text: log.GetId()}, {text: log.GetMessage()},
		})
		l.names = append(l.names, "log/"+log.GetId())
	}
	return l
}
