{{- define "meshagent.labels" -}}
app.kubernetes.io/name: meshagent
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{- end }}

{{- define "meshagent.selector" -}}
app.kubernetes.io/name: meshagent
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "meshagent.image" -}}
{{ .root.Values.image.registry }}/{{ .component }}:{{ .root.Values.image.tag | default .root.Chart.AppVersion }}
{{- end }}

{{- define "meshagent.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{- /* Names are fixed: a node has one mesh, and so has a cluster. */}}
{{- define "meshagent.controller" -}}meshagent-controller{{- end }}
{{- define "meshagent.replicas" -}}meshagent-controller-replicas{{- end }}
{{- define "meshagent.agent" -}}meshagent-agent{{- end }}
{{- define "meshagent.address" -}}{{ include "meshagent.controller" . }}.{{ .Release.Namespace }}.svc{{- end }}
